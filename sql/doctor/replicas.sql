-- Replicas that need not have a commit when it is reported. Receivers of logical replication are none that a failover
-- would go to, and a base backup is none either.
select
  'asynchronous-replicas' as "check",
  format('replica %s is %s', coalesce(nullif(r.application_name, ''), r.pid::text),
         case r.sync_state when 'async' then 'asynchronous' else 'synchronous only when another one fails' end) as subject,
  null as remedy
from pg_stat_replication r
where r.sync_state in ('async', 'potential') and r.state in ('catchup', 'streaming')
  and r.pid not in (select s.active_pid from pg_replication_slots s where s.slot_type = 'logical' and s.active_pid is not null)
union all
select 'unexamined', 'asynchronous-replicas: of those, only a member of pg_read_all_stats sees how they replicate',
       format('grant pg_read_all_stats to %I', current_user)
where not pg_has_role(current_user, 'pg_read_all_stats', 'usage')
  -- That there are some, everybody sees.
  and exists (select from pg_stat_replication)
order by 1, 2
