select partition, "offset", message_id, key, payload, headers, enqueued_at
from pgonce.receive($1, max => $2)
