select partition, "offset", message_id, key, payload, headers, enqueued_at, attempt
from pgonce.receive($1, max => $2, partition => $3, suspects => $4)
