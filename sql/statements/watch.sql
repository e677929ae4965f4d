select stage, name from pgonce.watch($1, $2, $3)
