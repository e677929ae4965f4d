-- Creates the schema, unless it is there: a role that may not create schemas can be given an empty one, which CREATE
-- SCHEMA IF NOT EXISTS would refuse. PostgreSQL's own refusal would name neither the role nor what helps.
do $$
begin
  if not exists (select from pg_namespace n where n.nspname = (parse_ident('pgonce.schema_versions'))[1]) then
    if not has_database_privilege(current_database(), 'create') then
      raise exception using errcode = 'insufficient_privilege',
        message = format('role %I may not create a schema in the database %I', current_user, current_database()),
        hint = format('Let its owner or a superuser run: grant create on database %I to %I.', current_database(), current_user);
    end if;
    create schema pgonce;
  end if;
end $$;
