-- Whatever somebody has hold of who is gone: of a process that was killed, or of another server in a restored dump.
--
-- Who lives is judged as by pgonce.lives (routines/member.sql).
with living as (
  select m.member_id
  from pgonce.members m
  where m.beat_at > clock_timestamp() - interval '5 seconds'
    and exists (select from pg_stat_activity a where a.pid = m.pid and a.datname = current_database())
)
select
  'dead-owners' as "check",
  format('member %s, process %s, is gone; it ran %s', m.member_id, m.pid, array_to_string(m.consumers, ', ')) as subject,
  null as remedy
from pgonce.members m
where m.member_id not in (select l.member_id from living l) and not pg_is_in_recovery()
union all
select 'dead-owners', format('the lease of consumer %s on partition %s is of %s, who is gone', c.consumer, l.partition, l.owner), null
from pgonce.leases l
join pgonce.consumers c using (consumer_id)
where l.owner is not null and not pg_is_in_recovery()
  and case when l.was_member then l.owner not in (select v.member_id from living v) else l.leased_until < clock_timestamp() end
union all
select 'dead-owners', format('what %s tried of consumer %s in partition %s is open, and it is gone', s.tried_by, c.consumer, s.partition), null
from pgonce.suspicions s
join pgonce.consumers c using (consumer_id)
where s.tried_by is not null and not pg_is_in_recovery() and s.tried_by not in (select v.member_id from living v)
union all
select
  'dead-owners',
  format('%s messages of consumer %s in partition %s are with a handler that is gone', cardinality(o.handed_over), o.consumer, o.partition),
  format('let consumer %s run: it makes dead letters of them', o.consumer)
from pgonce.consumer_offsets o
where o.handler is not null and not pg_is_in_recovery()
  and o.handler not in (select x from pg_snapshot_xip(pg_current_snapshot()) x)
union all
select 'unexamined', 'dead-owners: a standby does not know who lives at the primary', 'run the doctor at the primary as well'
where pg_is_in_recovery()
order by 2
