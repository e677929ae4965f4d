select dead_letter_id, consumer, topic, partition, "offset", message_id, key, attempts, error, failed_at::text as failed_at, state,
       settled_at::text as settled_at, settled_by::text as settled_by, payload::text as payload, headers::text as headers
from pgonce.dead_letter_list
where dead_letter_id = $1
