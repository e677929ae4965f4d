-- Reads only: for a role that may not create consumers. No row where it is not there; $2 is null for an inbox. Settings that
-- are left out may be any.
select (t.topic operator(pg_catalog.=) $2 or t.topic is null and $2 is null)
    and c.failure_policy operator(pg_catalog.=) coalesce($3, c.failure_policy)
    and c.attempts_max operator(pg_catalog.=) coalesce($4, c.attempts_max)
    and c.backoff_min_ms operator(pg_catalog.=) coalesce($5, c.backoff_min_ms)
    and c.backoff_max_ms operator(pg_catalog.=) coalesce($6, c.backoff_max_ms)
    and c.kind operator(pg_catalog.=) coalesce($7, c.kind) as is_as_said
from pgonce.consumers c
left join pgonce.topics t on t.topic_id operator(pg_catalog.=) c.topic_id
where c.consumer operator(pg_catalog.=) $1
