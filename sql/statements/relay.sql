select coalesce(sum(moved), 0) as moved, coalesce(sum(blocked), 0) as blocked from pgonce.relay($1, max => $2)
