-- The tables of the examples, and what their messages go through.
create table orders (
  id bigint primary key,
  placed_by text not null
);
create table invoices (
  consumer text not null,
  order_id bigint not null references orders,
  -- An order that was applied twice would be an error.
  primary key (consumer, order_id)
);
select topic from pgonce.create_topic('orders');
select consumer from pgonce.create_consumer('invoices-python', topic => 'orders');
select consumer from pgonce.create_consumer('invoices-node', topic => 'orders');
