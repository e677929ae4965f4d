select pgonce.record_handler_times($1, $2, $3, $4) as nears_limit
