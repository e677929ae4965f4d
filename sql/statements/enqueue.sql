select message_id, was_duplicate
from pgonce.enqueue($1, $2::jsonb, key => $3, message_id => $4, headers => $5::jsonb, deliver_at => $6::timestamptz)
