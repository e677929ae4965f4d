select consumer
from pgonce.create_consumer(
  $1, $2, start_at => $3, failure_policy => $4, attempts_max => $5, backoff_min_ms => $6, backoff_max_ms => $7,
  kind => $8)
