-- Handlers that take up to more than half of what they may: the message timeout, or the lease where that is shorter.
select
  'slow-handlers' as "check",
  format('the handler of consumer %s takes up to %s ms in 99 of 100 calls, of %s ms that it may take', c.consumer,
         round(p.p99_ms), p.limit_ms) as subject,
  null as remedy
from pgonce.handler_percentiles p
join pgonce.consumers c using (consumer_id)
where p.nears_limit
order by 2
