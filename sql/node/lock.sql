-- The lock by which the batches of several nodes follow each other: the row that a restore takes first as well. No row where
-- somebody has emptied the tables.
select c.consumer from pgonce.consumers c where c.consumer = $1 for no key update
