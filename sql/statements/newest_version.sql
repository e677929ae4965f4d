select version, program, routines_digest from pgonce.schema_versions order by version desc limit 1
