select outcome, is_surplus from pgonce.renew($1, $2, $3, $4)
