-- What there is of an order ($2) for an item ($1), on the naive side.
select (select count(*) from pgonce.plain_queue q where q.payload ->> 'order' = $2) as copies,
       (select count(*) from pgonce.plain_queue) as due,
       0::bigint as dead,
       (select i.stock from pgonce.inventory i where i.item = $1) as stock
