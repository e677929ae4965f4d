-- Triggers that do not fire: those of foreign keys, and those of the tables that hold effects.
select
  'triggers' as "check",
  format('trigger %I of table %s is disabled%s', t.tgname, t.tgrelid::regclass,
         (select format(' (constraint %I)', k.conname) from pg_constraint k where k.oid = t.tgconstraint)) as subject,
  format('alter table %s enable trigger %s', t.tgrelid::regclass, case when t.tgisinternal then 'all' else quote_ident(t.tgname) end) as remedy
from pg_trigger t
join pg_class c on c.oid = t.tgrelid
where t.tgenabled not in ('O', 'A')
  and (c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
    or c.oid in (select s.relation from pgonce.state_tables s))
union all
-- What writes of pgonce would run, or be turned into.
select 'triggers', format('trigger %I of table %s is none of pgonce', t.tgname, t.tgrelid::regclass),
       format('drop trigger %I on %s', t.tgname, t.tgrelid::regclass)
from pg_trigger t
join pg_class c on c.oid = t.tgrelid
where not t.tgisinternal
  and c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
union all
select 'triggers', format('rule %I of table %s is none of pgonce', w.rulename, w.ev_class::regclass),
       format('drop rule %I on %s', w.rulename, w.ev_class::regclass)
from pg_rewrite w
join pg_class c on c.oid = w.ev_class
where c.relkind = 'r'
  and c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
union all
select 'triggers', 'session_replication_role=replica in the configuration of the server',
       'alter system reset session_replication_role; select pg_reload_conf()'
from pg_settings s
where s.name = 'session_replication_role' and s.reset_val = 'replica' and s.source not in ('database', 'user', 'database user', 'global')
union all
select
  'triggers',
  format('%s for %s', c.setting, case
    when d.setrole <> 0 then format('role %s', d.setrole::regrole)
    when d.setdatabase = 0 then 'all roles'
    else 'this database' end),
  'reset session_replication_role there: triggers and foreign keys do not fire'
from pg_db_role_setting d
cross join lateral unnest(d.setconfig) c(setting)
where c.setting ~* '^session_replication_role=replica$'
  and d.setdatabase in (0, (select b.oid from pg_database b where b.datname = current_database()))
order by 2
