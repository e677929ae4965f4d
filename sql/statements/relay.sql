select coalesce(pg_catalog.sum(moved), 0) as moved, coalesce(pg_catalog.sum(blocked), 0) as blocked
from pgonce.relay($1, max => $2)
