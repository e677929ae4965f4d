select consumer from pgonce.beat($1, $2)
