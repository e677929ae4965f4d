-- Consumers whose guarantee is a weaker one, and those that nobody runs. Which mode it is says whoever runs one; that
-- messages are with a handler is also seen of those who have not said so.
select
  'external-consumers' as "check",
  format('consumer %s is external', c.consumer) as subject,
  null as remedy
from pgonce.consumers c
where c.kind = 'external'
union all
select distinct 'weaker-modes', format('consumer %s is %s', c.consumer, m.delivery),
       format('run it exactly_once, or accept it knowingly; a program of SQL says which it is: select pgonce.set_delivery(%L, ''exactly_once'')', c.consumer)
from pgonce.consumers c
cross join lateral (
  select c.delivery where c.kind = 'transactional'
  union
  select 'at_most_once' from pgonce.consumer_offsets o where o.consumer = c.consumer and o.handler is not null) m
where m.delivery <> 'exactly_once'
union all
select
  'unattended-consumers',
  format('nobody runs consumer %s; it lags %s messages behind, %s are parked%s', l.consumer, l.lag, l.parked,
         case when l.paused then ', and it is paused' end),
  format('run it, or let go of what waits: pgonce consumer delete ''%s''', replace(l.consumer, '''', '''\'''''))
from pgonce.consumer_lag l
where (l.lag > 0 or l.parked > 0)
  -- A standby does not know who runs what at the primary; that it says by itself (owners.sql).
  and not pg_is_in_recovery()
  and coalesce(l.sessions, 0) = 0
  and not exists (
    select from pgonce.members m
    where l.consumer = any (m.consumers) and m.beat_at > clock_timestamp() - interval '5 seconds'
      and exists (select from pg_stat_activity a where a.pid = m.pid and a.datname = current_database()))
order by 1, 2
