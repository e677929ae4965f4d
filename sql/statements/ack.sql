select outcome from pgonce.ack($1, $2, $3, $4, $5)
