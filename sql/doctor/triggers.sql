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
select
  'triggers',
  format('%s for %s', c.setting, case when d.setrole = 0 then 'this database' else format('role %s', d.setrole::regrole) end),
  'reset session_replication_role there: triggers and foreign keys do not fire'
from pg_db_role_setting d
cross join lateral unnest(d.setconfig) c(setting)
where c.setting = 'session_replication_role=replica'
  and d.setdatabase in (0, (select b.oid from pg_database b where b.datname = current_database()))
order by 2
