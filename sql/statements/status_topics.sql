select topic, paused, scheduled, pending, sent, duplicates, set_aside, touched,
       extract(epoch from oldest_pending_age)::float8 as oldest_pending_seconds
from pgonce.outbox_status
order by topic
