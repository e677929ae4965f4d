select failed, withdrawn from pgonce.try_statements($1, $2, $3, $4)
