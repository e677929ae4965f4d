insert into pgonce.schema_versions (version, program, routines_digest)
values ($1, $2, $3)
on conflict (version) do update
set program = excluded.program, routines_digest = excluded.routines_digest, installed_at = excluded.installed_at
