-- Settings of the server, of roles, of databases and of functions by which a commit that was reported may be lost, or
-- nothing can be written.
with configured as (
  select
    d.setrole,
    c.setting,
    case
      when d.setrole = 0 and d.setdatabase = 0 then 'role all'
      when d.setrole = 0 then format('database %I', current_database())
      when d.setdatabase = 0 then format('role %s', d.setrole::regrole)
      else format('role %s in database %I', d.setrole::regrole, current_database())
    end as target
  from pg_db_role_setting d
  cross join lateral unnest(d.setconfig) c(setting)
  where d.setdatabase in (0, (select b.oid from pg_database b where b.datname = current_database()))
)
select
  case s.name when 'fsync' then 'fsync' else 'full-page-writes' end as "check",
  format('%s is off', s.name) as subject,
  format('alter system set %s = on; select pg_reload_conf()', s.name) as remedy
from pg_settings s
where s.name in ('fsync', 'full_page_writes') and s.setting = 'off'
union all
select
  'synchronous-commit',
  format('synchronous_commit is %s in %s', s.setting, case
    when s.source in ('client', 'session') then 'this session'
    else 'the configuration of the server' end),
  case when s.source in ('client', 'session') then 'take it out of PGOPTIONS or the options of the URL'
    else 'alter system set synchronous_commit = on; select pg_reload_conf()' end
from pg_settings s
-- Those of roles and databases come below.
where s.name = 'synchronous_commit' and s.source not in ('database', 'user', 'database user', 'global')
  and (s.setting = 'off' or s.setting = 'local' and current_setting('synchronous_standby_names') <> '')
union all
select
  'synchronous-commit',
  format('%s for %s', c.setting, c.target),
  format('alter %s reset synchronous_commit', c.target)
from configured c
where c.setting ~* '^synchronous_commit=(off|false|no|0)$'
  or c.setting ~* '^synchronous_commit=local$' and current_setting('synchronous_standby_names') <> ''
union all
select
  'synchronous-commit',
  format('%s for function %s', c.setting, p.oid::regprocedure),
  format('alter function %s reset synchronous_commit', p.oid::regprocedure)
from pg_proc p
cross join lateral unnest(p.proconfig) c(setting)
where p.pronamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
  and c.setting ~* '^synchronous_commit=(off|false|no|0)$'
union all
select
  case s.name when 'default_transaction_isolation' then 'isolation' else 'read-only' end,
  format('%s is %s in %s', s.name, s.setting, case
    when s.source in ('client', 'session') then 'this session'
    else 'the configuration of the server' end),
  case when s.source in ('client', 'session') then 'take it out of PGOPTIONS or the options of the URL'
    else format('alter system set %s = %L; select pg_reload_conf()', s.name, s.boot_val) end
from pg_settings s
where s.source not in ('database', 'user', 'database user', 'global')
  and (s.name = 'default_transaction_isolation' and s.setting <> 'read committed'
    or s.name = 'default_transaction_read_only' and s.setting = 'on')
union all
-- Of roles, those count that work with pgonce.
select
  case when c.setting ~* '^default_transaction_isolation=' then 'isolation' else 'read-only' end,
  format('%s for %s', c.setting, c.target),
  format('alter %s reset %s', c.target, split_part(c.setting, '=', 1))
from configured c
where (c.setting ~* '^default_transaction_isolation=' and c.setting !~* '=read committed$'
    or c.setting ~* '^default_transaction_read_only=(on|true|yes|1)$')
  and (c.setrole = 0 or exists (
    select from pg_proc p
    where p.pronamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
      and p.proname in ('enqueue', 'relay', 'receive', 'acquire') and has_function_privilege(c.setrole, p.oid, 'execute')))
union all
select 'read-only', 'this server is a standby', 'connect to the primary: target_session_attrs=read-write'
where pg_is_in_recovery()
