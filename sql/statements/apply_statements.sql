select pgonce.apply_statements($1)
