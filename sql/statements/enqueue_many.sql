select message_id, was_duplicate
from pgonce.enqueue_many($1, $2::jsonb[], keys => $3, message_ids => $4, headers => $5::jsonb[], deliver_at => $6::timestamptz[])
order by "position"
