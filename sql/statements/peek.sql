select partition, "offset", message_id, key, payload, headers, enqueued_at, attempt, was_parked
from pgonce.peek($1, $2, $3, max => $4)
