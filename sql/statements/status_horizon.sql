-- Only what is old enough to be felt: a transaction of any worker holds it for a moment.
select kind, name, application_name, state, transactions::bigint as transactions, extract(epoch from age)::float8 as seconds
from pgonce.horizon_holders
where age is null or age > interval '1 minute'
order by transactions desc
limit 5
