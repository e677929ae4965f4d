select outcome, attempts, due_at, withdrawn from pgonce.fail($1, $2, $3, $4, permanent => $5, retry_at => $6)
