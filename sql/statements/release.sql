select outcome from pgonce.release($1, $2, $3)
