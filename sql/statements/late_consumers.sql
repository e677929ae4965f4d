-- For health checks: no more than they print, since what nobody asks of a view is not counted. A message that failed waits
-- since it was parked.
select l.consumer, l.lag, l.parked, extract(epoch from greatest(l.oldest_age, b.age))::float8 as seconds
from pgonce.consumer_lag l
left join (select consumer, max(age) as age from pgonce.blocked_keys group by consumer) b using (consumer)
where extract(epoch from greatest(l.oldest_age, b.age)) > $1
order by l.consumer
