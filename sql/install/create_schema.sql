-- Creates the schema, unless it is there: a role that may not create schemas can be given an empty one, which CREATE
-- SCHEMA IF NOT EXISTS would refuse.
do $$
begin
  if not exists (select from pg_namespace n where n.nspname = (parse_ident('pgonce.schema_versions'))[1]) then
    create schema pgonce;
  end if;
end $$;
