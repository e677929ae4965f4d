-- Without the lag, which is shown with the consumers.
select stage, name, seconds, received, applied, duplicates, retries, dead_letters, fenced, received_per_minute,
       applied_per_minute, duplicates_per_minute, retries_per_minute, dead_letters_per_minute, fenced_per_minute,
       handler_p50_ms, handler_p99_ms, handler_limit_ms, handler_nears_limit
from pgonce.rates
order by stage desc, name
