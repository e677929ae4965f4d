-- Autovacuum that is off, and what keeps dead rows alive: only what is old enough to be felt, as a transaction of any
-- worker holds it for a moment.
select
  'autovacuum' as "check",
  format('%s is off', s.name) as subject,
  format('alter system set %s = on; select pg_reload_conf()', s.name) as remedy
from pg_settings s
where s.name in ('autovacuum', 'track_counts') and s.setting = 'off'
union all
select
  'autovacuum',
  format('autovacuum is off for table %s', c.oid::regclass),
  format('alter table %s reset (autovacuum_enabled)', c.oid::regclass)
from pg_class c
cross join lateral unnest(c.reloptions) o(option)
where o.option ~* '^autovacuum_enabled=(off|false|no|0)$'
  and (c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
    or c.oid in (select s.relation from pgonce.state_tables s))
union all
select
  'xmin-horizon',
  format('%s %s keeps dead rows alive: %s transactions have begun since', h.kind, h.name, h.transactions),
  case h.kind
    when 'session' then format('end its transaction: select pg_terminate_backend(%s)', h.name)
    when 'replication slot' then format('let it be read, or drop it: select pg_drop_replication_slot(%L)', h.name)
    else 'commit it, or roll it back'
  end
from pgonce.horizon_holders h
where h.age is null or h.age > interval '1 minute'
union all
select 'unexamined-warnings', 'xmin-horizon: of sessions of other roles, only a member of pg_read_all_stats sees what they hold',
       format('grant pg_read_all_stats to %I', current_user)
where not pg_has_role(current_user, 'pg_read_all_stats', 'usage')
order by 1, 2
