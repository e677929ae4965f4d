select pgonce.clear_suspicion($1, $2)
