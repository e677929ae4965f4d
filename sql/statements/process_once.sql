select message_id, was_duplicate from pgonce.process_once($1, $2)
