select pgonce.set_delivery($1, $2) as is_written
