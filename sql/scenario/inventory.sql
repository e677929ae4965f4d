create table pgonce.inventory (
  item text primary key,
  stock integer not null
);
comment on table pgonce.inventory is 'The business table of a scenario: what a consumer decrements.';
