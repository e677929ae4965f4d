-- For health checks: no more than they print, since what nobody asks of a view is not counted.
select consumer, lag, extract(epoch from oldest_age)::float8 as seconds
from pgonce.consumer_lag
where extract(epoch from oldest_age) > $1
order by consumer
