select message_id, was_duplicate
from pgonce.emit($1, $2::jsonb, $3, $4, ordinal => $5, key => $6, headers => $7::jsonb)
