-- Records what is installed: the version of the tables, the program, and its functions and views.
insert into pgonce.schema_versions (version, program, routines_digest, routines)
values ($1, $2, $3, $4)
on conflict (version) do update
set program = excluded.program, routines_digest = excluded.routines_digest, routines = excluded.routines,
    installed_at = excluded.installed_at;
