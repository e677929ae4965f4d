-- Refuses to upgrade another version than the one meant, and goes on as the owner of what is installed: whoever runs an upgrade, what
-- it creates belongs to the same role.
do $$
declare
  found_version integer := (select max(v.version) from pgonce.schema_versions v);
begin
  if found_version is distinct from $1 then
    raise exception using errcode = 'object_not_in_prerequisite_state',
      message = format('the schema has version %s, and these statements upgrade version %s', found_version, $1),
      hint = format('Print those that fit: pgonce migrate --print --from %s.', found_version);
  end if;
  perform set_config('role', pg_get_userbyid(c.relowner), true)
  from pg_class c
  where c.oid = 'pgonce.schema_versions'::regclass;
end $$;
