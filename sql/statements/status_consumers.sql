select consumer, topic, kind, paused, lag, received, duplicates, failures, parked, dead, sessions,
       extract(epoch from oldest_age)::float8 as oldest_seconds
from pgonce.consumer_lag
order by consumer
