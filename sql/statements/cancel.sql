select message_id, was_cancelled from pgonce.cancel($1, $2)
