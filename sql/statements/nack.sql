select outcome, attempts from pgonce.nack($1, $2, $3, $4, $5, permanent => $6, retry_at => $7)
