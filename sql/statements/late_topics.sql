-- For health checks: no more than they print, since what nobody asks of a view is not counted.
select topic, pending, extract(epoch from oldest_pending_age)::float8 as seconds
from pgonce.outbox_status
where extract(epoch from oldest_pending_age) > $1
order by topic
