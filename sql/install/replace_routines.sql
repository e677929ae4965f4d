-- Replaces the functions and views of another program by those of this one.
--
-- In place, where PostgreSQL permits it: they keep their oids, and with them grants, views of users on top of them, and
-- calls that are under way. To drop and create all of them each time would be simpler, but a call that looked its function
-- up a moment before would fail ("cache lookup failed for function"): under load, every fourth upgrade hit a producer.
--
-- Where one cannot be replaced, all are dropped, the newest first, since each was created after what it depends on, and
-- created anew: where a result, the name of an argument or a column of a view has changed, or where other arguments made
-- a second function, which the COMMENT that names no arguments then finds ambiguous. The grants of what was dropped go to
-- what has its name now; a function from which PUBLIC was shut out stays shut. Whether PUBLIC is let in is for the text
-- to say. What is gone is dropped in either case.
--
-- Only what an installation has recorded is dropped, and nothing with CASCADE: an object of a user that stands in the way
-- is named in the error.
--
-- Locks: each view, ACCESS EXCLUSIVE.
do $install$
declare
  home constant regnamespace := (select c.relnamespace from pg_class c where c.oid = 'pgonce.schema_versions'::regclass);
  definitions constant text := $1;
  names constant text[] := $2;
  ours constant text[] := names || (select v.routines from pgonce.schema_versions v order by v.version desc limit 1);
  before constant oid[] := array(
    select p.oid from pg_proc p where p.pronamespace = home and p.proname = any (ours)
    union all
    select c.oid from pg_class c where c.relnamespace = home and c.relname = any (ours) and c.relkind = 'v');
  replaced boolean := true;
  grants jsonb;
  target record;
  obstacles text;
begin
  select jsonb_agg(g) into grants
  from (
    select p.proname as routine, null::name as view, null::name as "column",
           format('grant execute on routine %s.%I to %s', home, p.proname, a.grantee::regrole)
             || case when a.is_grantable then ' with grant option' else '' end as statement
    from pg_proc p
    cross join lateral aclexplode(p.proacl) a
    where p.oid = any (before) and a.grantee not in (0, p.proowner)
    union all
    select p.proname, null, null, format('revoke execute on routine %s.%I from public', home, p.proname)
    from pg_proc p
    where p.oid = any (before) and 0 <> all (select a.grantee from aclexplode(p.proacl) a) and p.proacl is not null
    union all
    select null, c.relname, a."column",
           format('grant %s%s on %s.%I to %s', a.privilege_type, ' (' || quote_ident(a."column") || ')', home, c.relname,
                  case when a.grantee = 0 then 'public' else a.grantee::regrole::text end)
             || case when a.is_grantable then ' with grant option' else '' end
    from pg_class c
    cross join lateral (
      select null::name as "column", e.* from aclexplode(c.relacl) e
      union all
      select t.attname, e.* from pg_attribute t cross join lateral aclexplode(t.attacl) e where t.attrelid = c.oid) a
    where c.oid = any (before) and a.grantee <> c.relowner) g;

  begin
    execute definitions;
  exception when invalid_function_definition or invalid_table_definition or ambiguous_function then
    replaced := false;
  end;
  for target in
    select p.oid, format('drop routine %s', p.oid::regprocedure) as statement
    from pg_proc p
    where p.oid = any (before)
      and (not replaced or p.proname <> all (names))
    union all
    select c.oid, format('drop view %s', c.oid::regclass)
    from pg_class c
    where c.oid = any (before) and (not replaced or c.relname <> all (names))
    order by oid desc
  loop
    execute target.statement;
  end loop;
  if not replaced then
    execute definitions;
  end if;

  for target in
    select g.statement
    from jsonb_to_recordset(grants) g(routine name, view name, "column" name, statement text)
    where exists (
        select from pg_proc p where p.pronamespace = home and p.proname = g.routine and p.oid <> all (before))
      or exists (
        select from pg_class c
        where c.relnamespace = home and c.relname = g.view and c.oid <> all (before)
          and (g."column" is null
            or exists (select from pg_attribute t where t.attrelid = c.oid and t.attname = g."column")))
  loop
    execute target.statement;
  end loop;
exception when dependent_objects_still_exist then
  get stacked diagnostics obstacles = pg_exception_detail;
  raise exception using errcode = 'dependent_objects_still_exist',
    message = format('the functions and views of the schema %s cannot be replaced: %s', home, obstacles),
    hint = 'Drop what depends on them, upgrade, and create it again. With pgonce migrate --print that is one transaction.';
end $install$;
