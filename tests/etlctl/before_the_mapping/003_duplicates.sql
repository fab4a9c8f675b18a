-- What analysts need to find the addresses and devices that more than one login shares.
create index if not exists user_logins_masked_ip_idx on user_logins (masked_ip);
create index if not exists user_logins_masked_device_id_idx on user_logins (masked_device_id);

create or replace view duplicate_ips as
select
    masked_ip,
    count(*)                as logins,
    count(distinct user_id) as users,
    min(create_date)        as first_day,
    max(create_date)        as last_day
from user_logins
where masked_ip is not null
group by masked_ip
having count(*) > 1;

create or replace view duplicate_devices as
select
    masked_device_id,
    count(*)                as logins,
    count(distinct user_id) as users,
    min(create_date)        as first_day,
    max(create_date)        as last_day
from user_logins
where masked_device_id is not null
group by masked_device_id
having count(*) > 1;
