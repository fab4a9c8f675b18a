-- The table as the original exercise gives it. Nothing is added, so that an existing one is taken as it is.
create table if not exists user_logins (
    user_id          varchar(128),
    device_type      varchar(32),
    masked_ip        varchar(256),
    masked_device_id varchar(256),
    locale           varchar(32),
    app_version      integer,
    create_date      date
);
