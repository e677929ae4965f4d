select pgonce.retract_suspicion($1, $2, $3)
