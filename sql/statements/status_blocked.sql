-- Neither payloads nor errors, which may quote them: a reader's role sees no messages. The view has the oldest first; an
-- order of ours would count what waits behind each.
select consumer, partition, key, message_id, attempts, waiting, extract(epoch from age)::float8 as seconds
from pgonce.blocked_keys
limit 5
